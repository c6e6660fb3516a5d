"""Models with pretrained weights, by name: timm's, those of the Hugging Face Hub, and folders that timm wrote."""
