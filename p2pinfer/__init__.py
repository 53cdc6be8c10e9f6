"""p2pinfer: the machines of a lab together serve one Llama, and a reply survives any of them."""

__version__ = "0.1.0"
