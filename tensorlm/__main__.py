"""Entry point of `python -m tensorlm NAME ...` and `torchrun ... -m tensorlm train ...`."""

from tensorlm.commands.app import main

if __name__ == "__main__":
    main()
