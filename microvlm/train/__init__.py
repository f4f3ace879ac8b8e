"""Train, distil and calibrate."""
