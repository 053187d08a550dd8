"""`python -m deepseek_compress` is `dsc`."""

from deepseek_compress.cli import main

if __name__ == "__main__":
    main()
