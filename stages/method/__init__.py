"""The SPPO method without files, parameters or devices: losses, win probabilities, chat templates, batches, seeding."""
