"""``python -m hf_kernel_patch``: the command line."""

from hf_kernel_patch.cli.commands import main

if __name__ == "__main__":
    main()
