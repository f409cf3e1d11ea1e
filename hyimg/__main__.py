"""`python -m hyimg`, which `accelerate launch -m hyimg` needs."""

from hyimg.cli.app import main

if __name__ == "__main__":
    main()
