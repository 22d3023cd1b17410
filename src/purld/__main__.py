"""Run the command line as `python -m purld`."""

from purld.cli import main

if __name__ == "__main__":
    main()
