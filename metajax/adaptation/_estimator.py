class FewShotClassifier: pass
