#!/usr/bin/env bash
# From an empty machine to a measured score.   ./speedrun.sh [JOB] [flags]
#
#   mini         the default: 6x6 Sudoku, generated and learned here in minutes
#   mini-maze    9x9 mazes, likewise; one of them is solved before your eyes
#   mini-arc     6x6 tasks of ARC-AGI-1, downloaded or from --source DIR
#   minis        these three one after the other, and a table
#   sudoku       Sudoku-Extreme, MLP mixer; sudoku-att: the same with attention
#   sudoku-fast  sudoku with narrower SwiGLUs, 0.44 of the arithmetic
#   maze         30x30 mazes
#   arc1, arc2   ARC-AGI-1, ARC-AGI-2; all: the five published ones in turn
#   arc1-fast    the same on small canvases, 0.4 of the arithmetic; arc2-fast
#   gpu-check    ten minutes on one GPU: is it right here, and how fast?
#   test, setup  the tests; only the Python environment .venv
#
# A job sets up what is missing, builds its dataset under data/, trains on all
# GPUs and evaluates; the score is the RESULT line. minis train anew every time;
# the others go to runs/speedrun-JOB: a stopped run goes on from its checkpoint,
# a finished one is not repeated. One GPU: batch 768 and learning rate 1e-4.
# Flags go to train.py (test: pytest) and win. Commands are printed after a "+".
#
#   TRM_PYTHON=FILE    use this Python in place of .venv
#   UV_FIND_LINKS=DIR  a folder of local wheels (PIP_FIND_LINKS does the same)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'exit 130' INT  # Ctrl-C ends the script, not only the command that runs

die() { echo "error: $*" >&2; exit 2; }
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$(basename "$0")"; }  # the comment at the head of the script
run() { printf '+'; printf ' %q' "$@"; echo; "$@"; }
stage() { local TIMEFORMAT="== $1: %1R s"; shift; time "$@"; }  # stage NAME COMMAND...: says how long it took

find_uv() {  # sets UV to the one on PATH, else to our own in .uv: a folder, which any pip may fill
  for UV in "$(command -v uv)" .uv/bin/uv; do "$UV" --version >/dev/null 2>&1 && return; done
  echo "installing uv into .uv"
  rm -rf .uv; mkdir .uv
  python3 -m pip install --target .uv uv >.uv/log 2>&1 && return
  curl -LsSf https://astral.sh/uv/install.sh 2>>.uv/log |
    UV_INSTALL_DIR=$PWD/.uv/bin UV_NO_MODIFY_PATH=1 sh >>.uv/log 2>&1 && return
  die "uv cannot be installed (see .uv/log): install it, or name a Python with TRM_PYTHON"
}

# byte-compiled, as a first `import torch._inductor` would else compile 2,000 files
uv_install() { run "$UV" pip install --compile-bytecode --python "$PY" -r requirements.txt "$@"; }

setup() {  # sets PY, the Python of all jobs
  PY=${TRM_PYTHON:-.venv/bin/python}
  if [ -n "${TRM_PYTHON:-}" ]; then
    "$PY" -c 'import importlib.metadata; importlib.metadata.version("torch")' 2>/dev/null && return
    die "TRM_PYTHON=$PY does not run, or lacks torch: install requirements.txt into it, or name another"
  fi
  if cmp -s requirements.txt .venv/.requirements && "$PY" -c ''; then return; fi
  [ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"
  find_uv
  "$PY" -c '' 2>/dev/null || { rm -rf .venv; run "$UV" venv -q --python '>=3.10,<3.15' .venv; }
  if ! uv_install --torch-backend=auto; then
    echo "PyTorch's own index may be out of reach: now without it (on Linux 3 GB of CUDA, or a local wheel)"
    uv_install || die "requirements.txt cannot be installed (see above): mend that, or set TRM_PYTHON"
  fi
  cp requirements.txt .venv/.requirements  # says that all of it is there
}

count_gpus() {  # sets gpus
  gpus=$("$PY" -c 'import torch; print(torch.cuda.device_count() + torch.backends.mps.is_available())')
}
on_all_gpus() {  # on_all_gpus SCRIPT [flags]
  [ "$gpus" -le 1 ] || set -- -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$@"
  run "$PY" "$@"
}

dataset() { stage "dataset of $1" run "$PY" -m prepare "${1%-*}"; }  # sudoku-att has that of sudoku
big() {  # big PRESET [flags]
  local preset=$1; shift
  # without a GPU train.py says what it would take, and stops: no gigabytes before that
  [[ $gpus = 0 && " $* " != *" --allow-cpu"* ]] || dataset "$preset"
  [ "$gpus" -gt 1 ] || set -- --global-batch-size 768 --lr 1e-4 "$@"
  set -- --preset "$preset" --resume --run-dir "runs/speedrun-$preset" "$@"
  stage "training of $preset" on_all_gpus train.py "$@"
}

small() {  # small PRESET [--source DIR] [flags]: on a CPU, anew each time; sets folder, that of the run
  local preset=$1 from=; shift
  [ "${1:-}" != --source ] || { from="--source=${2:?}"; shift 2; }
  [ "$preset" != mini-arc ] ||
    stage "dataset of $preset" run "$PY" -m prepare mini-arc mini-arc-tune ${from:+"$from"}
  folder=runs/$preset-$(date +%Y%m%d-%H%M%S)
  [[ " $* " = *" --run-dir "* ]] || set -- --run-dir "$folder" "$@"
  set -- --preset "$preset" "$@"
  stage "training of $preset" run "$PY" train.py "$@"
  while [ $# -gt 0 ]; do [ "$1" != --run-dir ] || folder=$2; shift; done
  [ "$preset" != mini-maze ] || run "$PY" solve.py --checkpoint "$folder"
  [ "$preset" != mini-arc ] ||
    run "$PY" baselines.py data/arc-6x6-mini data/arc-6x6-mini-tune --checkpoint "$folder"
}

main() {
  local preset folders=() job=${1:-mini} jobs="mini mini-maze mini-arc minis test gpu-check sudoku sudoku-fast
    sudoku-att maze arc1 arc1-fast arc2 arc2-fast all setup"
  [ $# = 0 ] || shift
  case $job in -h | --help) usage; return ;; esac
  [[ " $(echo $jobs) " = *" $job "* ]] || die "unknown job '$job'; one of:" $jobs
  stage setup setup
  case $job in
    setup) ;;
    test) stage test run "$PY" -m pytest -q tests "$@" ;;
    gpu-check) stage gpu-check run "$PY" gpu_check.py "$@" ;;
    mini | mini-maze | mini-arc) small "$job" "$@" ;;
    minis)  # --source DIR matters to the last alone
      for preset in mini mini-maze mini-arc; do small "$preset" "$@"; folders+=("$folder"); done
      run "$PY" results.py "${folders[@]}" ;;
    all) count_gpus; for preset in sudoku sudoku-att maze arc1 arc2; do big "$preset" "$@"; done ;;
    *) count_gpus; big "$job" "$@" ;;
  esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
