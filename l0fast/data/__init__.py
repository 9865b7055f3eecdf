"""From question sets as they are found to one that can be trained on: merged, judged, filtered, decontaminated, split."""
