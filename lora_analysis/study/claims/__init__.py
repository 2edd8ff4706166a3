"""The claims C1 to C17 of the LoRA paper, one file for each question, and the rules that judge them."""
