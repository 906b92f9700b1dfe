"""python -m prepare NAME ...: build known datasets."""

from prepare import main
from tools.common import cli

cli(main)
