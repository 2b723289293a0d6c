"""The stages on NumPy arrays: vectorised, one BLAS call an expert. Input has been checked at the door."""
