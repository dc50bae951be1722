"""`python -m odis_path` is `odis-path`."""

from odis_path.cli import main

if __name__ == "__main__":
    main()
