#!/usr/bin/env bash
# From an empty machine to a measured score.   ./speedrun.sh [JOB] [flags]
#
#   mini         the default: 6x6 Sudoku, generated and learned here in minutes
#   sudoku       Sudoku-Extreme, MLP mixer; sudoku-att: the same with attention
#   maze         30x30 mazes
#   arc1, arc2   ARC-AGI-1, ARC-AGI-2; all: these five one after the other
#   test, setup  the tests; only the Python environment .venv
#
# A job sets up what is missing, builds its dataset under data/, trains on all
# GPUs and evaluates; the score is the RESULT line. mini trains anew every time;
# the others go to runs/speedrun-JOB: a stopped run goes on from its checkpoint,
# a finished one is not repeated. One GPU: batch 768 and learning rate 1e-4.
# Flags go to train.py (test: pytest) and win. Commands are printed after a "+".
#
#   TRM_PYTHON=FILE    use this Python; else an active environment that has the
#                      pinned torch is used, else .venv
#   UV_FIND_LINKS=DIR  a folder of local wheels (PIP_FIND_LINKS does the same)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'exit 130' INT  # Ctrl-C ends the script, not only the command that runs

die() { echo "error: $*" >&2; exit 2; }
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$(basename "$0")"; }  # the comment at the head of the script
run() { echo "+ $*"; "$@"; }
stage() { local TIMEFORMAT="== $1: %1R s"; shift; time "$@"; }  # stage NAME COMMAND...: says how long it took

unmet() {  # unmet PYTHON: what it lacks of requirements.txt, by metadata only: importing torch takes seconds
  "$1" -c 'if True:
    import re, importlib.metadata as metadata
    for name, pin in re.findall(r"^(\w+)(?:==([\d.]+))?", open("requirements.txt").read(), re.M):
        have = [d.version.split("+")[0] for d in metadata.distributions(name=name)]
        if not have or pin not in ("", have[0]): print(name, end=" ")' 2>/dev/null
}

own_environment() {  # sets PY to TRM_PYTHON or an active environment with the pinned torch; fails when there is neither
  local lacks
  for PY in "${TRM_PYTHON:-}" "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python"; do
    case $PY in "" | /bin/python | "$PWD/.venv/bin/python") continue ;; esac
    lacks=$(unmet "$PY") || lacks="torch, for it does not run "
    case $lacks in
      "") echo "using $PY"; return ;;
      torch*) [ "$PY" != "${TRM_PYTHON:-}" ] || die "TRM_PYTHON=$PY lacks the pinned ${lacks% }; install it or unset it"
              echo "not using the active $PY: it lacks the pinned ${lacks% }" ;;
      *) die "$PY has the right torch but lacks ${lacks% }; run: $PY -m pip install -r requirements.txt" ;;
    esac
  done
  return 1
}

find_uv() {  # sets UV to the one on PATH, else to our own in .uv: a folder that an externally managed Python allows
  UV=$(command -v uv) || UV=$PWD/.uv/bin/uv
  if "$UV" --version >/dev/null 2>&1; then return; fi
  UV=$PWD/.uv/bin/uv; rm -rf .uv; mkdir .uv; echo '*' >.uv/.gitignore
  echo "installing uv into .uv"
  { python3 -m venv .uv && .uv/bin/python -m pip install uv || python3 -m pip install --target .uv uv ||
    curl -LsSf https://astral.sh/uv/install.sh | UV_INSTALL_DIR=$PWD/.uv/bin UV_NO_MODIFY_PATH=1 sh; } >>.uv/log 2>&1 ||
    { UV=""; echo "uv cannot be installed (see .uv/log): using pip"; return 1; }
}

# byte-compiled: a first `import torch._inductor` would else compile 2,000 files, or every one where it may not write
uv_install() { run "$UV" pip install --compile-bytecode --python .venv/bin/python -r requirements.txt "$@"; }
install() {  # install PYTHON3: fills .venv by uv with PyTorch's index, else by uv without it, else by pip
  if find_uv; then
    [ -x .venv/bin/python ] || run "$UV" venv -q --allow-existing --python "${1:-3.12}" .venv || UV=""
    [ -n "$UV" ] && uv_install --torch-backend=auto && return
    echo "that failed, perhaps because PyTorch's own index cannot be reached: now without it"
  fi
  # shellcheck disable=SC2086  # several folders
  { command -v nvidia-smi || find ${PIP_FIND_LINKS:-/dev/null} -name 'torch-*' | grep .; } >/dev/null 2>&1 ||
    echo "no GPU and no local wheel of torch: on Linux the plain index gives torch with CUDA, 3 GB (Ctrl-C to stop)"
  [ -n "$UV" ] && uv_install && return
  [ -n "$1" ] && run "$1" -m venv .venv && run .venv/bin/python -m pip install -r requirements.txt
}

setup() {  # sets PY, the Python that runs everything
  local stamp=.venv/.requirements python3  # the stamp: a copy of what was installed, empty while that is under way
  own_environment && return
  PY=.venv/bin/python
  if [ -s $stamp ] && cmp -s requirements.txt $stamp && $PY -c ''; then echo "using .venv"; return; fi
  if [ -e .venv ] && { [ -e $stamp ] && [ ! -s $stamp ] || ! $PY -c ''; } 2>/dev/null; then
    echo ".venv is half made or broken: making it anew"; rm -rf .venv
  fi
  [ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"
  [ -z "${UV_FIND_LINKS:-}" ] || export PIP_FIND_LINKS="${PIP_FIND_LINKS:-${UV_FIND_LINKS//,/ }}"
  python3=$(python3 -c 'import sys; print(sys.executable * ((3, 10) <= sys.version_info < (3, 15)))') || python3=""
  echo "installing requirements.txt into .venv"
  mkdir -p .venv; : >$stamp
  install "$python3" || die "no way worked (see above): install requirements.txt into a Python of yours, set TRM_PYTHON"
  cp requirements.txt $stamp
}

dataset() {  # dataset PRESET: build its dataset when absent
  case $1 in
    sudoku | sudoku-att) set -- sudoku-extreme-1k-aug-1000 sudoku.py --subsample-size 1000 --num-aug 1000 ;;
    maze) set -- maze-30x30-hard-1k maze.py ;;
    arc1) set -- arc1concept-aug-1000 arc.py ;;
    arc2) set -- arc2concept-aug-1000 arc.py --subsets training2 evaluation2 concept --test-set-name evaluation2 ;;
  esac
  if [ -e "data/$1/recipe.json" ]; then echo "data/$1 is there"; return; fi
  run "$PY" "prepare/$2" "${@:3}" --output-dir "data/$1"
}

count_gpus() { gpus=$("$PY" -c 'import torch; print(torch.cuda.device_count() + torch.backends.mps.is_available())'); }
on_all_gpus() {  # on_all_gpus SCRIPT [flags]
  [ "$gpus" -le 1 ] || set -- -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$@"
  run "$PY" "$@"
}

result() {  # result RUN_DIR: the RESULT line of its log; fails when there is none, or the run was cut short
  "$PY" -c 'if True:
    import json, sys
    log = [json.loads(line) for line in open(sys.argv[1])]
    print(log[-1]["line"])
    assert log[-1]["finished"]
  ' "$1/log.jsonl" 2>/dev/null
}

train() {  # train PRESET [flags]: a finished run is left alone, a stopped one resumed, unless the flags name the run
  local preset=$1 dir=runs/speedrun-$1 line; shift
  if [[ " $* " != *" --run-dir"* && " $* " != *" --resume"* ]]; then
    if line=$(result "$dir"); then echo "$line"; echo "$dir is finished; move it away to train anew"; return; fi
    if [ -e "$dir/latest.txt" ]; then set -- --resume "$dir" "$@"; else set -- --run-dir "$dir" "$@"; fi
  fi
  [[ $gpus -gt 1 || " $* " = *" --resume"* ]] || set -- --global-batch-size 768 --lr 1e-4 "$@"
  on_all_gpus train.py --preset "$preset" "$@"
}

main() {
  local job=${1:-mini} jobs="mini test sudoku sudoku-att maze arc1 arc2 all setup" preset; [ $# = 0 ] || shift
  case $job in
    -h | --help) usage; return ;;
    all) jobs="sudoku sudoku-att maze arc1 arc2" ;;
    *) [[ " $jobs " = *" $job "* ]] || die "unknown job '$job'; one of: $jobs"; jobs=$job ;;
  esac
  stage setup setup
  case $job in
    setup) return ;;
    test) stage test run "$PY" -m pytest -q tests "$@"; return ;;
    mini) stage mini run "$PY" train.py --preset mini "$@"; return ;;
  esac
  count_gpus
  for preset in $jobs; do
    [[ $gpus = 0 && " $* " != *" --allow-cpu"* ]] || stage "dataset of $preset" dataset "$preset"  # else train.py stops
    stage "training of $preset" train "$preset" "$@"
  done
  for preset in $jobs; do result "runs/speedrun-$preset" || true; done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
