"""`sft`, also as `python -m sft_cli`."""

from cli.main import main

if __name__ == "__main__":
    main()
