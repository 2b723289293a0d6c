"""The door: whatever a caller hands over is recognised, checked and refused here, once."""
