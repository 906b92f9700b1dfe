#!/usr/bin/env bash
# From an empty machine to a measured score.   ./speedrun.sh [JOB] [flags]
#
#   mini         the default: generate 6x6 Sudokus and learn them in minutes
#   mini-maze    9x9 mazes on a CPU; the trained model then solves one of them
#   mini-arc     6x6 tasks of ARC-AGI-1, downloaded or read from --source DIR
#   minis        mini, mini-maze and mini-arc in turn, then a table
#   sudoku-9x9   9x9 Sudokus, generated and learned on a CPU in about an hour
#   sudoku       Sudoku-Extreme, MLP mixer; sudoku-att: the same with attention
#   sudoku-fast  sudoku with narrower SwiGLUs, 0.44 of the FLOPs
#   maze         30x30 mazes; maze-gen: the same kind of mazes, generated here
#   arc1, arc2   ARC-AGI-1, ARC-AGI-2; all: the five published models in turn
#   arc1-fast    arc1 on small canvases, 0.4 of the FLOPs; also arc2-fast
#   gpu-check    compare one GPU with the CPU, then measure its speed
#   test, setup  run the tests; only create the Python environment .venv
#
# A job installs what is missing, builds its dataset under data/, trains on all
# GPUs and evaluates; the RESULT line has the score. The minis and sudoku-9x9
# start a new run each time. The others train in runs/speedrun-JOB: re-run a
# stopped job to resume it; a finished one is not repeated. A new run on one GPU
# uses batch size 768 and learning rate 1e-4. Flags are passed to train.py (test:
# pytest, gpu-check: tools.bench) and win. Commands are printed after a "+".
#
#   TRM_PYTHON=FILE    use this Python instead of .venv
#   UV_FIND_LINKS=DIR  a folder of local wheels (PIP_FIND_LINKS works too)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'exit 130' INT  # Ctrl-C ends the script, not only the command that runs

die() { echo "error: $*" >&2; exit 2; }
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$(basename "$0")"; }  # the comment at the top of the script
run() { printf '+'; printf ' %q' "$@"; echo; "$@"; }
stage() { local TIMEFORMAT="== $1: %1R s"; shift; time "$@"; }  # stage NAME COMMAND...: prints its duration

find_uv() {  # sets UV: the uv on PATH, else the one in .uv, which an externally managed pip may fill, too
  for UV in "$(command -v uv)" .uv/bin/uv; do "$UV" --version >/dev/null 2>&1 && return; done
  echo "installing uv into .uv"
  rm -rf .uv; mkdir .uv
  python3 -m pip install --target .uv uv >.uv/log 2>&1 && return
  curl -LsSf https://astral.sh/uv/install.sh 2>>.uv/log |
    UV_INSTALL_DIR=$PWD/.uv/bin UV_NO_MODIFY_PATH=1 sh >>.uv/log 2>&1 && return
  die "uv cannot be installed (see .uv/log); install uv, or set TRM_PYTHON to a Python with torch"
}

# byte-compiled, because the first `import torch._inductor` would otherwise compile 2,000 files
uv_install() { run "$UV" pip install --compile-bytecode --python "$PY" -r requirements.txt "$@"; }

setup() {  # sets PY, the Python of all jobs
  PY=${TRM_PYTHON:-.venv/bin/python}
  if [ -n "${TRM_PYTHON:-}" ]; then
    local torch needed; needed=$(grep '^torch' requirements.txt)
    torch=$("$PY" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) ||
      die "TRM_PYTHON=$PY does not run or has no torch; it needs $needed"
    [[ $torch =~ ^(2\.[1-9][0-9]|[3-9]) ]] && return  # 2.10 or newer
    die "TRM_PYTHON=$PY has torch $torch; it needs $needed"
  fi
  if cmp -s requirements.txt .venv/.requirements && "$PY" -c ''; then return; fi
  [ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"
  find_uv
  "$PY" -c '' 2>/dev/null || { rm -rf .venv; run "$UV" venv -q --python '>=3.10,<3.15' .venv; }
  if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    echo "No NVIDIA GPU found: PyTorch's index of CPU builds is tried first. If it cannot be reached, PyPI's"
    echo "build downloads 3 GB of CUDA; to avoid that, set UV_FIND_LINKS to a folder with a CPU wheel."
  fi
  if ! uv_install --torch-backend=auto; then
    echo "PyTorch's index may be unreachable: trying again without it"
    uv_install || die "requirements.txt cannot be installed (see above); fix that, or set TRM_PYTHON"
  fi
  cp requirements.txt .venv/.requirements  # marks the environment as complete
}

count_gpus() {  # sets gpus
  gpus=$("$PY" -c 'import torch; print(torch.cuda.device_count() + torch.backends.mps.is_available())')
}
on_all_gpus() {  # on_all_gpus SCRIPT [flags]
  [ "$gpus" -le 1 ] || set -- -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$@"
  run "$PY" "$@"
}
value_of() {  # value_of FLAG [flags]: prints the value of the last "FLAG X" or "FLAG=X"
  local flag=$1 value=; shift
  while [ $# -gt 0 ]; do
    case $1 in "$flag") value=${2:-} ;; "$flag"=*) value=${1#*=} ;; esac; shift
  done
  [[ $value = -* ]] || echo "$value"  # another flag is no value: `--resume --seed 3`
}

dataset() { stage "dataset of $1" run "$PY" -m prepare "$@"; }
big() {  # big PRESET [flags]: trains in runs/speedrun-PRESET, where it also resumes
  local preset=$1 base=${1%-att} folder; shift
  [ "$base" != maze-gen ] || base="maze-gen maze"  # trained on the first, scored on the second
  # without a GPU train.py only prints a time estimate: download nothing for that
  [[ $gpus = 0 && " $* " != *" --allow-cpu"* ]] || dataset ${base%-fast}
  folder=$(value_of --run-dir "$@"); folder=${folder:-runs/speedrun-$preset}
  # a run keeps the settings that it began with, on any number of GPUs
  [ "$gpus" -gt 1 ] || [ -n "$(value_of --resume "$@")" ] || ls "$folder"/step_*.ckpt >/dev/null 2>&1 ||
    set -- --global-batch-size 768 --lr 1e-4 "$@"
  stage "training of $preset" on_all_gpus train.py --preset "$preset" --resume --run-dir "$folder" "$@"
}

small() {  # small PRESET [--source DIR] [flags]: a new run on one device; sets folder to its run folder
  local preset=$1 source=; shift
  case ${1:-} in --source) source=${2:?needs a folder}; shift 2 ;; --source=*) source=${1#*=}; shift ;; esac
  [ "$preset" != mini-arc ] || dataset mini-arc mini-arc-tune ${source:+--source "$source"}
  folder=$(value_of --run-dir "$@"); folder=${folder:-runs/$preset-$(date +%Y%m%d-%H%M%S)}
  stage "training of $preset" run "$PY" train.py --preset "$preset" --run-dir "$folder" "$@"
  case $preset in
    mini-maze) run "$PY" -m tools.solve --checkpoint "$folder" ;;
    # training scored the half of the tasks that settings were chosen on; this is the other half
    mini-arc) run "$PY" eval.py --checkpoint "$folder" --data data/arc-6x6-mini --output "$folder/report" ;;
  esac
  case $preset in mini | mini-maze | sudoku-9x9) run "$PY" -m tools.page "$folder" "$folder/page.html" ;; esac
}

main() {
  local preset folders=() job=${1:-mini} jobs="mini mini-maze mini-arc minis sudoku-9x9 sudoku sudoku-fast
    sudoku-att maze maze-gen arc1 arc1-fast arc2 arc2-fast all gpu-check test setup"
  [ $# = 0 ] || shift
  case $job in -h | --help) usage; return ;; esac
  [[ " $(echo $jobs) " = *" $job "* ]] || die "unknown job '$job'; choose one of:" $jobs
  [[ $job != minis && $job != all ]] || [ -z "$(value_of --run-dir "$@")" ] ||
    die "--run-dir is a folder for one run, but $job trains several models; leave it out"
  stage setup setup
  case $job in
    setup) ;;
    test) stage test run "$PY" -m pytest -q tests "$@" ;;
    gpu-check)
      stage "GPU tests" run "$PY" -m pytest -q tests/test_cuda.py
      for preset in sudoku arc1; do run "$PY" -m tools.bench --preset $preset "$@"; done ;;
    mini | mini-maze | mini-arc | sudoku-9x9) small "$job" "$@" ;;
    minis)  # only mini-arc uses --source DIR
      for preset in mini mini-maze mini-arc; do small "$preset" "$@"; folders+=("$folder"); done
      run "$PY" -m tools.draw "${folders[@]}" ;;
    all) count_gpus; for preset in sudoku sudoku-att maze arc1 arc2; do big "$preset" "$@"; done ;;
    *) count_gpus; big "$job" "$@" ;;
  esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
