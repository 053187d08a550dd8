"""`python -m deepseek_compress` is `dsc`."""

from deepseek_compress import processes

processes.leave_directory()  # `python -m` put it first, and a checkpoint's torch.py may lie there

from deepseek_compress.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
