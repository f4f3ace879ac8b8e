"""Run the measurement: python -m benchmarks.speed."""

from .run import main

if __name__ == "__main__":
    main()
