"""`apply`: a mask made real, in memory or in a directory; and the formats that a pruned model can be written in."""
