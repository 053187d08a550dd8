"""The targets of `dsc export`, one file each: a class whose fields are its knobs."""
