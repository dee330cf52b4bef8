"""What a trained model is worth: accuracy under attack, masks, signs that gradients mislead."""
