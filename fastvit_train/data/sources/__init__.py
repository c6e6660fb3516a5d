"""Where images come from: folders, published data sets, the Hugging Face Hub."""
