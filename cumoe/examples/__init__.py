"""Programs to copy from: ``python -m cumoe.examples.NAME`` runs one, on the GPU where its library has one."""
