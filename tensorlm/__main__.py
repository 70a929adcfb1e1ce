"""`python -m tensorlm NAME ...`, also under torchrun: `torchrun ... -m tensorlm train ...`."""

from tensorlm.commands.app import main

if __name__ == "__main__":
    main()
