"""nanotrain: from-scratch GPT pretraining. Raw parquet text in, an evaluated base model out."""
