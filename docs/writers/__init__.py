"""What writes the pages that nobody types: stories, tutorials with their output, recorded results, mathematics."""
