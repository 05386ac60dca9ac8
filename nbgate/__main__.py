"""Run the commands as `python -m nbgate`."""

from nbgate.cli import main

main()
