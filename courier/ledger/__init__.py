"""What Redis holds about every job, server and image, and the only code that reads or writes it."""
