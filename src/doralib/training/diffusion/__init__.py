"""Learning of pictures: what each family of diffusion models needs, and the loss."""
