"""python -m prepare NAME ...: see __init__.py."""
from common import cli
from prepare import main

cli(main)
