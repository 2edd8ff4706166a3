"""``python -m lora_analysis``, the same as ``lora-analysis``."""

from lora_analysis.cli import main

if __name__ == "__main__":
    main()
