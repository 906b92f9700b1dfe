"""python -m prepare NAME ...: see __init__.py."""
import sys

from common import cli
from prepare import main

cli(lambda: main(sys.argv[1:]))
