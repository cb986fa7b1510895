"""What the model is: the geometry of a Llama 4, and the shapes and names that follow from it. Knows no other room."""
