"""``python -m minipeft``."""

from minipeft.cli.main import main

if __name__ == "__main__":
    main()
