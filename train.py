"""Pre-train a language model: ``python train.py --size 1b`` (the same as ``python -m train``)."""

from train.__main__ import main

if __name__ == "__main__":
    main()
