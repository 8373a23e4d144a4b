"""``python -m scam_models.cli``, where the package is not installed."""

from . import main

if __name__ == "__main__":
    main()
