"""How ids come to be, and what bytes they stand for, in the quantities of a data set."""
