#!/usr/bin/env bash
# Rolls a version of visionedge out over the devices of an IoT Hub, ring by ring. docs/fleet.md explains it.
#
# Needs: bash 4, python3 (3.9 or newer), az with the extension azure-iot. Only the functions in "az" call az:
#
# | command                                                                       | where it is described           |
# |-------------------------------------------------------------------------------|---------------------------------|
# | az account show                                                               | [1] az account                  |
# | az extension show --name                                                      | [1] az extension                |
# | az iot hub query --hub-name --query-command                                   | [2] az iot hub query            |
# | az iot hub device-twin update --hub-name --device-id --tags                   | [2] az iot hub device-twin      |
# | az iot hub module-twin show --hub-name --device-id --module-id                | [2] az iot hub module-twin      |
# | az iot hub module-twin update --hub-name --device-id --module-id --desired    | [2] az iot hub module-twin      |
# | az iot edge deployment list --hub-name                                        | [2] az iot edge deployment      |
# | az iot edge deployment create --hub-name --deployment-id --content            |                                 |
# |    --target-condition --priority --labels --metrics --layered                 | [2] az iot edge deployment      |
# | az iot edge deployment show-metric --hub-name --deployment-id --metric-id     |                                 |
# |    --metric-type                                                              | [2] az iot edge deployment      |
# | az iot edge deployment delete --hub-name --deployment-id                      | [2] az iot edge deployment      |
#
# Each also has --output json and --only-show-errors, which all commands of az have.
# [1] Azure CLI 2.91.0 (2026-10): its own parser accepts the command with all these parameters.
# [2] As [1], with the extension azure-iot 0.25.0 (2024-10-15); compared with its reference on learn.microsoft.com.
# Looked at on 2026-11-30. Not run against a real hub: tests/repository/test_fleet_rollout.py runs all of it against
# a stand-in for az that takes these commands and parameters, and no others.
set -euo pipefail

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

hub=${IOT_HUB:-}
name=vision
rings=0,1,2
tag=ring
layer=$folder/vision.layered.json
base=$folder/base.deployment.json
version=
device=
percent=100
tolerate=0
priority=
interval=30
polls=60
soak=10
dry_run=
force=
metrics=

usage() {
  cat << 'END'
Usage: rollout.sh COMMAND --hub NAME [OPTION...]

Rolls a version of visionedge out over the devices of an IoT Hub, ring by ring. A ring is the devices whose device
twin has tags.ring = '0' (first), '1', '2'. docs/fleet.md has the whole procedure.

Commands:
  base                    create the base deployment for all rings; ${NAME} in it is filled from the environment
  tag DEVICE RING         put a device into a ring
  roll --version V        a deployment for each ring; waits until the ring is healthy, then takes the next ring
  status [--version V]    deployments, their metrics, and one line for each device
  rollback --version V    delete the deployments of V, so that those of the version before hold again
  cameras DEVICE FILE     make the cameras of a device those of a file (YAML or JSON, only the key 'cameras')

Options:
  --hub NAME              the IoT Hub (default: $IOT_HUB)
  --version V             the version that the module reports (properties.reported.module.version), such as 0.2.0
  --layer FILE            the layered deployment (default: vision.layered.json beside this script)
  --base FILE             the base deployment (default: base.deployment.json beside this script)
  --rings LIST            the rings in their order (default: 0,1,2)
  --tag NAME              the tag of the device twin that holds the ring (default: ring)
  --name ID               the module's id (default: vision)
  --priority N            of the new deployments (default: one more than the highest of this module, first 10)
  --percent N             the share of a ring's devices that must be healthy (default: 100)
  --tolerate N            devices of a ring that may have a fault (default: 0)
  --device DEVICE         where all devices must compute, such as cuda (default: as each device was requested to)
  --interval SECONDS      between two polls of a ring (default: 30)
  --polls N               polls of a ring before the roll-out gives up (default: 60)
  --soak N                further polls of a healthy ring before the next ring (default: 10)
  --force                 rollback even if no other deployment of the module is left for a ring
  --dry-run               change nothing: print each command that would change something, and run those that read
  -h, --help              this text

A ring stops the roll-out when, in two polls in a row, more devices than --tolerate report with the new version
  - that they compute on the CPU although a GPU was requested (or not on --device), or
  - that a section of their configuration is rejected,
or when after --polls polls fewer than --percent % of its devices are healthy: new version, connected, an engine, and
each camera live that was live before.

Exit codes: 0 done; 1 a command of az failed; 2 wrong arguments or files; 3 az, its extension or python3 is missing,
or nobody is logged in; 4 the roll-out was stopped.

Examples:
  rollout.sh roll --hub contoso --version 0.2.0 --dry-run
  rollout.sh roll --hub contoso --version 0.2.0 --percent 95 --device cuda
  rollout.sh rollback --hub contoso --version 0.2.0
END
}

fail() { # CODE TEXT
  printf 'rollout: %s\n' "$2" >&2
  exit "$1"
}

say() { printf '%s\n' "$*"; }

# --- az: every command that this script uses -------------------------------------------------------------------

# Runs az; its error becomes one line. JSON on stdout.
call_az() {
  local code=0
  az "$@" --output json --only-show-errors 2> "$work/error" || code=$?
  ((code)) || return 0
  local text
  text=$(grep -v '^[[:space:]]*$' "$work/error" | head -n 1 || true)
  if grep -q 'az login' "$work/error"; then
    fail 3 "nobody is logged in: run 'az login'"
  fi
  fail 1 "az $1 $2 $3 ${4:-} failed: ${text:-exit code $code}"
}

# Prints a command as it can be pasted.
show_command() {
  local word
  printf '+ az'
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      printf ' %s' "$word"
    else
      printf " '%s'" "${word//\'/\'\\\'\'}"
    fi
  done
  printf '\n'
}

# A command that changes something: printed, and run unless --dry-run.
change() {
  show_command "$@"
  [[ -n $dry_run ]] || call_az "$@" > /dev/null
}

# A command that only reads: its answer goes into a file. Printed only in a dry run.
read_into() { # FILE ARGUMENT...
  local file=$1
  shift
  [[ -z $dry_run ]] || show_command "$@"
  call_az "$@" > "$file"
}

check_az() {
  command -v az > /dev/null || fail 3 "az is missing: install the Azure CLI"
  command -v python3 > /dev/null || fail 3 "python3 is missing: install it"
  probe extension show --name azure-iot \
    || fail 3 "the extension azure-iot of az is missing: az extension add --name azure-iot"
  probe account show || fail 3 "nobody is logged in: run 'az login'"
}

# A command of which only the exit code counts.
probe() {
  [[ -z $dry_run ]] || show_command "$@"
  az "$@" --output json --only-show-errors > /dev/null 2>&1
}

query() { read_into "$1" iot hub query --hub-name "$hub" --query-command "$2"; }

list_deployments() { read_into "$work/deployments" iot edge deployment list --hub-name "$hub"; }

create_layer() { # ID RING PRIORITY
  change iot edge deployment create --hub-name "$hub" --deployment-id "$1" --content "$layer" \
    --target-condition "tags.$tag='$2'" --priority "$3" \
    --labels "{\"visionedge\": \"$name\", \"version\": \"$version\", \"ring\": \"$2\"}" \
    --metrics "$metrics" --layered
}

create_base() { # CONTENT CONDITION
  change iot edge deployment create --hub-name "$hub" --deployment-id "$name-base" --content "$1" \
    --target-condition "$2" --priority 1
}

delete_deployment() { change iot edge deployment delete --hub-name "$hub" --deployment-id "$1"; }

show_metric() { # ID METRIC
  read_into "$work/metric" iot edge deployment show-metric --hub-name "$hub" --deployment-id "$1" \
    --metric-id "$2" --metric-type user
}

set_tags() { change iot hub device-twin update --hub-name "$hub" --device-id "$1" --tags "$2"; }

show_module_twin() {
  read_into "$work/twin" iot hub module-twin show --hub-name "$hub" --device-id "$1" --module-id "$name"
}

set_desired() {
  change iot hub module-twin update --hub-name "$hub" --device-id "$1" --module-id "$name" --desired "$2"
}

# --- reading JSON ----------------------------------------------------------------------------------------------

twins() { python3 "$folder/twins.py" "$@"; }

query_modules() { query "$work/modules" "SELECT * FROM devices.modules WHERE moduleId = '$name'"; }

query_ring() { # RING
  query "$work/rows" "SELECT deviceId FROM devices WHERE capabilities.iotEdge = true AND tags.$tag = '$1'"
  twins devices < "$work/rows" > "$work/ring"
  [[ -s $work/ring ]] || fail 2 "ring $1 has no devices: no IoT Edge device has tags.$tag = '$1'"
}

# IoT Hub takes lower-case letters, digits and a few marks in an id, no dot.
deployment_id() { # RING
  local id=$name-$version-ring$1
  id=${id//[^A-Za-z0-9-]/-}
  printf '%s' "${id,,}"
}

# --- commands --------------------------------------------------------------------------------------------------

run_base() {
  twins fill --content "$base" > "$work/base.json" || exit $?
  local condition='' ring
  for ring in "${ring_list[@]}"; do
    condition+="${condition:+ OR }tags.$tag='$ring'"
  done
  create_base "$work/base.json" "$condition"
  [[ -n $dry_run ]] || say "the base deployment $name-base is created"
}

run_tag() {
  [[ ${#operands[@]} -eq 2 ]] || fail 2 "tag: give DEVICE and RING"
  [[ " ${ring_list[*]} " == *" ${operands[1]} "* ]] \
    || fail 2 "unknown ring ${operands[1]}: the rings are $rings (--rings)"
  set_tags "${operands[0]}" "{\"$tag\": \"${operands[1]}\"}"
}

run_roll() {
  need_version
  twins check-layer --name "$name" --version "$version" --content "$layer" || exit $?
  metrics=$(twins metrics --name "$name" --version "$version")
  list_deployments
  [[ -n $priority ]] || priority=$(twins next-priority --name "$name" < "$work/deployments")
  # All rings are looked at before anything is changed.
  local ring
  for ring in "${ring_list[@]}"; do query_ring "$ring"; done
  for ring in "${ring_list[@]}"; do roll_ring "$ring"; done
  if [[ -n $dry_run ]]; then
    say "dry run: nothing is changed; without --dry-run each ring is waited for"
  else
    say "version $version: all rings are done"
  fi
}

roll_ring() { # RING
  local ring=$1 id state
  id=$(deployment_id "$ring")
  query_ring "$ring"
  query_modules
  twins live < "$work/modules" > "$work/before"
  say "ring $ring: $(wc -l < "$work/ring") devices"
  state=$(twins compare --id "$id" --content "$layer" < "$work/deployments") || exit $?
  case $state in
    absent) create_layer "$id" "$ring" "$priority" ;;
    same) say "ring $ring: deployment $id exists already" ;;
    *) fail 2 "deployment $id exists with other content: roll it back first, or give another --version" ;;
  esac
  [[ -n $dry_run ]] || wait_for_ring "$ring"
}

wait_for_ring() { # RING
  local ring=$1 poll healthy_polls=0 faulty_polls=0 state healthy total last=''
  for ((poll = 1; poll <= polls + soak; poll++)); do
    query_modules
    judge_ring > "$work/judged" || exit $?
    read -r state healthy total < "$work/judged"
    show_progress "$poll" "ring $ring: $healthy of $total healthy"
    if [[ $state == fault ]]; then
      faulty_polls=$((faulty_polls + 1))
      ((faulty_polls < 2)) || stop "$ring" "$(devices_judged) devices have a fault (at most $tolerate may)"
    else
      faulty_polls=0
    fi
    if [[ $state == enough ]]; then
      healthy_polls=$((healthy_polls + 1))
      ((healthy_polls <= soak)) || return 0
    else
      healthy_polls=0
      ((poll < polls)) || break
    fi
    sleep "$interval"
  done
  stop "$ring" "$healthy of $total devices are healthy after $poll polls; $percent % are needed"
}

judge_ring() {
  twins judge --version "$version" --device "$device" --percent "$percent" --tolerate "$tolerate" \
    --ring-devices "$work/ring" --before "$work/before" < "$work/modules"
}

devices_judged() { tail -n +2 "$work/judged" | wc -l; }

# Only what has changed since the poll before.
show_progress() { # POLL TEXT
  [[ $2 == "$last" ]] || say "$2 (poll $1)"
  last=$2
}

stop() { # RING REASON
  tail -n +2 "$work/judged" | sed 's/^/  /' >&2
  say "to go back: rollout.sh rollback --hub $hub --version $version"
  fail 4 "stopped in ring $1: $2"
}

run_status() {
  list_deployments
  twins table --name "$name" < "$work/deployments"
  local ring id metric
  for ring in "${ring_list[@]}"; do
    query_ring "$ring"
    query_modules
    say "ring $ring:"
    twins report --ring-devices "$work/ring" < "$work/modules"
  done
  [[ -n $version ]] || return 0
  for id in $(twins ids --name "$name" --version "$version" --ring "${ring_list[0]}" < "$work/deployments"); do
    for metric in newVersion onCpu rejected noEngine; do
      show_metric "$id" "$metric"
      say "$metric: $(python3 -c 'import json, sys; print(len(json.load(sys.stdin)["result"]))' < "$work/metric")"
    done
  done
}

run_rollback() {
  need_version
  list_deployments
  local ring id found=()
  for ring in "${ring_list[@]}"; do
    local these others
    these=$(twins ids --name "$name" --version "$version" --ring "$ring" < "$work/deployments")
    others=$(twins ids --name "$name" --version "$version" --ring "$ring" --others < "$work/deployments")
    [[ -n $these ]] || continue
    [[ -n $others || -n $force ]] \
      || fail 2 "ring $ring has no other deployment of $name: its devices would lose the module (--force)"
    while read -r id; do found+=("$id"); done <<< "$these"
  done
  ((${#found[@]})) || fail 2 "there is no deployment of $name with version $version"
  # The last ring first: the way back is the way there, backwards.
  for ((ring = ${#found[@]} - 1; ring >= 0; ring--)); do delete_deployment "${found[ring]}"; done
  [[ -n $dry_run ]] || say "version $version: ${#found[@]} deployments are deleted; the version before holds again"
}

run_cameras() {
  [[ ${#operands[@]} -eq 2 ]] || fail 2 "cameras: give DEVICE and FILE"
  local target=${operands[0]} file=${operands[1]}
  [[ -r $file ]] || fail 2 "$file: cannot be read"
  show_module_twin "$target"
  # First, because `config check` would advise to set the variable of a ${NAME}, which a twin cannot have.
  twins cameras --file "$file" < "$work/twin" > "$work/desired.json" || exit $?
  if command -v visionedge > /dev/null; then
    visionedge config check "$file" >&2 || fail 2 "$file: is not a valid configuration; nothing is changed"
  else
    say "rollout: warning: visionedge is not installed here; $file is not checked" >&2
  fi
  # As a file: arguments can be seen by everybody on this machine.
  set_desired "$target" "$work/desired.json"
  [[ -n $dry_run ]] || say "$target: the cameras are those of $file; properties.reported.config.cameras has the answer"
}

# --- arguments -------------------------------------------------------------------------------------------------

need_version() { [[ -n $version ]] || fail 2 "give --version, such as 0.2.0"; }

check_number() { # OPTION VALUE
  [[ $2 =~ ^[0-9]{1,6}$ ]] || fail 2 "$1: '$2' must be a whole number"
}

command=
operands=()
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 ;;
    --force) force=1 ;;
    --hub | --version | --layer | --base | --rings | --tag | --name | --priority | --percent | --tolerate | --device \
      | --interval | --polls | --soak)
      (($# > 1)) || fail 2 "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    -*) fail 2 "unknown option $1; --help lists all" ;;
    *) if [[ -z $command ]]; then command=$1; else operands+=("$1"); fi ;;
  esac
  shift
done

case $command in
  base | tag | roll | status | rollback | cameras) ;;
  '') fail 2 "give a command; --help lists all" ;;
  *) fail 2 "unknown command $command; --help lists all" ;;
esac
[[ -n $hub ]] || fail 2 "give --hub NAME, or set IOT_HUB"
for option in percent tolerate interval polls soak; do check_number "--$option" "${!option}"; done
[[ -z $priority ]] || check_number --priority "$priority"
# These values stand in queries and conditions.
for option in name tag device version; do
  [[ ${!option} =~ ^[A-Za-z0-9._+-]*$ ]] || fail 2 "--$option: '${!option}' has a character that is not allowed"
done
[[ $rings =~ ^[A-Za-z0-9_-]+(,[A-Za-z0-9_-]+)*$ ]] || fail 2 "--rings: '$rings' must be names with commas between them"
IFS=, read -r -a ring_list <<< "$rings"
((percent <= 100)) || fail 2 "--percent: $percent is more than 100"

((BASH_VERSINFO[0] >= 4)) || fail 3 "bash 4 or newer is needed"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
check_az
"run_$command"
