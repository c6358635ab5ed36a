"""What `inspect` tells of a recipe: its needs on a GPU, and its fit on cards by their data sheets."""
