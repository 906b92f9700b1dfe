#!/usr/bin/env bash
# Score published weights:  ./speedrun-inference.sh arc1|maze|sudoku|all [flags]
#
#   arc1     alphaXiv/trm-model-arc-agi-1 on ARC-AGI-1
#   maze     alphaXiv/trm-model-maze on 30x30 mazes
#   sudoku   alphaXiv/trm-model-sudoku on Sudoku-Extreme
#   all      these three, one after the other
#
# Sets up what is missing, builds the dataset under data/, downloads the weights
# and evaluates on all GPUs. Figures go to runs/inference-JOB. Flags go to eval.py
# and win (`python eval.py --help` lists them). Every command is printed after a
# "+" before it runs, to paste and change.
set -euo pipefail
source "$(dirname "$0")/speedrun.sh"  # its stages; it also enters the repository's folder

score() {  # score PRESET [flags]
  local preset=$1 repo=alphaXiv/trm-model-${1/arc1/arc-agi-1}; shift
  on_all_gpus eval.py --hf "$repo" --output "runs/inference-$preset" "$@"
}

main() {
  local job=${1:-} jobs="arc1 maze sudoku" preset; [ $# = 0 ] || shift
  case $job in
    -h | --help) usage; return ;;
    all) ;;
    *) [[ -n $job && " $jobs " = *" $job "* ]] || die "unknown job '$job'; one of: $jobs all"; jobs=$job ;;
  esac
  stage setup setup
  count_gpus
  for preset in $jobs; do
    stage "dataset of $preset" dataset "$preset"
    stage "scoring of $preset" score "$preset" "$@"
  done
  for preset in $jobs; do echo "results: runs/inference-$preset"; done
}

main "$@"
