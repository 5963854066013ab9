#!/bin/sh
# Runs inside `docker build`: makes /layers/NAME of what was added to /opt/visionedge, reproducibly.
#
#   image_layer.sh intel     Debian's OpenCL driver for Intel GPUs, into the layer `locked`
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

# The names of Debian's installed packages, sorted.
list_packages() {
  dpkg-query --show --showformat '${db:Status-Abbrev}${binary:Package}\n' | sed -n 's/^ii *//p' | sort
}

# Copies files of this image to the layer `locked`, each under its real folder (/lib is a link to usr/lib).
copy_files() {
  while read -r path; do
    if [ -d "$path" ] && [ ! -L "$path" ]; then continue; fi
    folder=/layers/locked$(realpath "$(dirname "$path")")
    mkdir -p "$folder"
    cp -a "$path" "$folder/"
  done
}

case $1 in
  intel)
    if [ "$(dpkg --print-architecture)" != amd64 ]; then
      echo "image_layer.sh: Intel's OpenCL driver exists for amd64 only: OpenVINO computes on the CPU"
      exit 0
    fi
    list_packages > /tmp/packages-before
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends intel-opencl-icd
    list_packages > /tmp/packages-after
    # The licences stay; offline compiler, headers and other documentation are of no use here.
    comm -13 /tmp/packages-before /tmp/packages-after | while read -r package; do
      dpkg --listfiles "$package" | sed -e '\#/doc/.*/copyright$#b' -e '\#/share/\(doc\|lintian\)#d' \
        -e '\#^/usr/include/#d' -e '/ocloc/d'
      ls /var/lib/dpkg/info/"${package%%:*}".* /var/lib/dpkg/info/"$package".* 2> /dev/null || true
    done | sort -u > /tmp/files
    echo /var/lib/dpkg/status >> /tmp/files
    copy_files < /tmp/files
    ;;
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
