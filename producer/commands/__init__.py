"""The sub-commands of ``pacs``, one module per kind of work. How things look is in ``producer/show.py``."""
