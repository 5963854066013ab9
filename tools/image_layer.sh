#!/bin/sh
# Runs inside `docker build`: makes /layers/NAME of what was added to /opt/visionedge, reproducibly.
#
#   image_layer.sh locked    the environment with all locked packages
#   image_layer.sh own       visionedge itself, and /layers/bundled with its model and clip
set -eu
root=/opt/visionedge
site=$(echo "$root"/lib/python3*/site-packages)

# Bytecode that names no time of a source file; Python never compares it with the source.
compile() {
  "$root/bin/python" -m compileall -q --invalidation-mode unchecked-hash "$@"
}

# Moves paths of /opt/visionedge to /layers/NAME, all with one date.
make_layer() {
  layer=/layers/$1
  shift
  for path in "$@"; do
    mkdir -p "$layer$(dirname "$path")"
    mv "$path" "$layer$path"
  done
  find "$layer" -exec touch --no-dereference -d @0 {} +
}

case $1 in
  locked)
    # No package imports its tests, onnx its C++ sources, or cv2 the face models that lie beside it.
    find "$site" -type d -name tests -prune -exec rm -rf {} +
    rm -rf "$site/onnx/backend/test" "$site/gevent/testing"
    find "$site/onnx" \( -name '*.cc' -o -name '*.h' \) -delete
    rm -f "$site"/cv2/data/*.xml
    find "$site" -path '*/nvidia/*' \
      \( -path '*/include/*' -o -name '*.a' -o -name '*.alt.so.*' \) ! -type d -delete
    compile "$root/lib"
    mkdir -p /layers/locked/opt
    cp -a "$root" /layers/locked/opt/
    find /layers/locked -exec touch --no-dereference -d @0 {} +
    ;;
  own)
    compile "$site/visionedge"
    make_layer bundled "$site/visionedge/_bundled"
    make_layer own "$root/bin/visionedge" "$root/share" "$site/visionedge" "$site"/visionedge-*.dist-info
    ;;
  user)
    mkdir -p /layers/user/etc /layers/data/data
    cp -a /etc/group /etc/passwd /layers/user/etc
    echo 'visionedge:x:10001:' >> /layers/user/etc/group
    echo 'visionedge:x:10001:10001::/data:/usr/sbin/nologin' >> /layers/user/etc/passwd
    chmod 0750 /layers/data/data
    find /layers/user /layers/data -exec touch --no-dereference -d @0 {} +
    ;;
esac
