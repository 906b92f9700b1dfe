#!/usr/bin/env bash
# Score published weights:  ./speedrun-inference.sh arc1|maze|sudoku|all [flags]
#
#   arc1     alphaXiv/trm-model-arc-agi-1 on ARC-AGI-1
#   maze     alphaXiv/trm-model-maze on 30x30 mazes
#   sudoku   alphaXiv/trm-model-sudoku on Sudoku-Extreme
#   all      these three in turn
#
# Installs what is missing, builds the dataset under data/, downloads the weights
# and evaluates them on all GPUs. Results are written to runs/inference-JOB. Flags
# are passed to eval.py and win (see `python eval.py --help`). Commands are
# printed after a "+".
set -euo pipefail
source "$(dirname "$0")/speedrun.sh"  # its functions; it also enters the repository's folder

job=${1:-} presets="arc1 maze sudoku"; [ $# = 0 ] || shift
case $job in
  -h | --help) usage; exit ;;
  arc1 | maze | sudoku) presets=$job ;;
  all) ;;
  *) die "unknown job '$job'; choose one of: $presets all" ;;
esac
[ "$job" != all ] || [ -z "$(value_of --output "$@")" ] || die "--output is a folder for one job; leave it out"
stage setup setup
count_gpus
for preset in $presets; do
  dataset "$preset"
  stage "scoring of $preset" on_all_gpus eval.py --hf "alphaXiv/trm-model-${preset/arc1/arc-agi-1}" \
    --output "runs/inference-$preset" "$@"
done
