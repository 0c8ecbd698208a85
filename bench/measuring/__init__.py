"""What every benchmark measures with, and the rows that it writes."""
