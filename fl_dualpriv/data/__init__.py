"""Images and questions: reading, checking, partitioning and cached features."""
