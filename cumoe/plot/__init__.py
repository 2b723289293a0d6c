"""Pictures from the files of the benchmark; matplotlib is imported when the first one is made."""
