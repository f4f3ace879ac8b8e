"""Run the measurement: python -m benchmarks.speed."""

from .run import main

main()
