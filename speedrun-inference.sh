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
# and win (`python eval.py --help` lists them). Commands are printed after a "+".
set -euo pipefail
source "$(dirname "$0")/speedrun.sh"  # its stages; it also enters the repository's folder

job=${1:-} presets="arc1 maze sudoku"; [ $# = 0 ] || shift
case $job in
  -h | --help) usage; exit ;;
  arc1 | maze | sudoku) presets=$job ;;
  all) ;;
  *) die "unknown job '$job'; one of: $presets all" ;;
esac
stage setup setup
count_gpus
for preset in $presets; do
  dataset "$preset"
  stage "scoring of $preset" on_all_gpus eval.py --hf "alphaXiv/trm-model-${preset/arc1/arc-agi-1}" \
    --output "runs/inference-$preset" "$@"
done
