"""Phrasings of right and wrong answers to a gold answer, for the check of mathematical answers."""

RIGHT = {
    "7": [
        "The answer is not 5 but 7.", "The answer isn't 5, it is 7.",
        "The answer is not 5, it's 7.", "答案是 7。", "The answer is 7, not 5.", "7, not 5",
        r"First \boxed{5}. Wait, that is wrong. Corrected: \boxed{7}", r"$\boxed{5}$. Corrected: $\boxed{7}$",
        r"\boxed{7} or \boxed{7.0}", "7.", "= 7", "There are 7 of them.", "Step 1: 3+4. Step 2: 7.",
        "3 + 4 = 7. So the answer is 7 apples.", "Final answer: 7",
        "Final Answer: The final answer is $7$. I hope it is correct.", "The final answer is 7",
        'Answer: 7\nExplanation: 3 + 4 = 7, and 12 is too many.', "The answer is 5. No wait, the answer is 7.",
        "I first thought the answer was 5, but it is 7.", r"\fbox{7}", r"$\boxed 7$", r"\boxed{\text{7}}",
        r"\boxed{\mathbf{7}}", r"\boxed{\textbf{7}}", r"\boxed{(7)}",
        "The answer is 7 because 12 - 6 = 6 and one more.", "The answer is 7 (3 + 4).",
        "The answer is 7, and 12 is too many.", "The answer can be computed as 3 + 4 = 7.",
        "The answer must be an integer. 3 + 4 = 7.", "**Final answer:** $7$", r"The answer is $\boxed{7}$.",
        "Answer: $3 + 4 = 7$", 'So 3 + 4 = 7.\n\nI hope this helps!', r"The answer is \(7\).", r"\[ \boxed{7} \]",
        r"\[ x = 7 \]", "Therefore, she has 7 apples.", "Therefore, she has seven (7) apples.", "7 apples",
        "La respuesta es 7. (No 5.)", "Die Antwort ist 7, denn 12 - 5 = 7.", "La réponse est 7 pommes pour 3 enfants.",
        "Réponse : 7\nVérification : 7 + 5 = 12", "Ответ: 7. Проверка: 7 + 5 = 12", "答えは7です。検算：7 + 5 = 12",
        "정답은 7입니다. 검산: 7 + 5 = 12", "答案是7。验算：7 + 5 = 12",
        "A resposta é 7. Confira: 7 + 5 = 12", "答案：７", "７",
        "7 apples, because 3 + 4 = 7", r"\boxed{3} \boxed{4} \boxed{7}",
    ],
    r"\boxed{5, 7}": [
        r"\boxed{5} and \boxed{7}", r"$\boxed{5}$ and $\boxed{7}$", r"\boxed{7, 5}", r"\boxed{5,7}",
        "The answers are 5 and 7.", "x = 5 or x = 7",
    ],
    "1234": [
        "1,234", "The answer is 1,234.", "1 234", "1234.0", "1234.00 dollars", "$1,234", "$1,234.00", r"\$1,234",
        r"\boxed{\$1,234}", "The answer is $1,234.", "It costs $1234 in total.", "€1,234", "£1,234",
    ],
    "1,234": [
        "1234",
    ],
    "1234567": [
        "The total is 1,234,567", r"\boxed{1,234,567}", r"\boxed{1{,}234{,}567}", r"\boxed{1\,234\,567}",
    ],
    "5": [
        "$5", "The answer is $5.", "She pays $5 and keeps $3. The answer is $5.", r"\boxed{\$5}",
        r"\boxed{5\text{ dollars}}", r"\boxed{5 \text{ cm}}", r"\boxed{5\,\mathrm{cm}^2}", "5 cm", "5cm",
        "The answer is 5 km/h.", "5 m^2", "**5**", "**Answer:** 5", "**Answer: 5**", "Answer: **5**",
        "The answer is **5**.", "#### 5", "#### 5.0", "x = 5", "$x = 5$", r"\boxed{x = 5}", "2 + 3 = 5",
        "So 10 / 2 = 5 apples.", "The answer is 5", "Answer: 5 cm^2", "5 m", "The answer is 5 m.",
        r"$5\text{ apples}$", r"$5 \text{ m/s}$", r"\boxed{5 apples}", r"\boxed{The answer is 5}", r"\boxed{\$5.00}",
        "5 dollars and 0 cents", "It's 5", "5?", "≈ 5", "The answer is approximately 5.", "<answer>5</answer>",
        "A: 5", "The value of x is 5", "I get $x=5$ and so the answer is $5$", "Answer = 5", "The answer: 5",
        "ANSWER: 5", "The answer would be 5", "the correct answer is: 5", 'The answer is:\n5',
        'The answer is:\n\n$$5$$', 'The answer is\n\\[5\\]',
    ],
    "-5": [
        "The answer is -5", r"\boxed{-5}", "−5", "The answer is −5.", "$-5$",
    ],
    "0.5": [
        "1/2", ".5", "0.50", "The answer is 1/2.", r"\boxed{\frac12}", r"\boxed{\frac{1}{2}}",
        r"\boxed{\dfrac{1}{2}}", r"\boxed{\tfrac12}", r"\boxed{1/2}", r"$\frac{1}{2}$", "½", "50%", r"50\%",
    ],
    "50%": [
        "50%", "50", "0.5",
    ],
    r"50\%": [
        r"\boxed{50\%}", r"\boxed{50}",
    ],
    "50": [
        r"\boxed{50\%}", "50%", "50 percent", "The answer is 50%.", r"$50\%$",
    ],
    "1/3": [
        "1/3", "2/6",
    ],
    "-1/3": [
        "-1/3",
    ],
    "3.14": [
        "3.14", "3,14",
    ],
    "2.5": [
        "2 1/2", r"\boxed{2\frac{1}{2}}", "2½",
    ],
    "1000000": [
        "10^6", "1e6", "10^{6}", r"\boxed{10^6}",
    ],
    r"\pi": [
        r"$\pi$",
    ],
    r"2\pi": [
        r"\boxed{2\pi}", r"\boxed{2 \pi}",
    ],
    "(3,4)": [
        "(3, 4)", r"\boxed{(3,4)}", r"\boxed{\left(3,4\right)}",
    ],
    r"\sqrt{2}": [
        r"\boxed{\sqrt2}",
    ],
    "x^2+1": [
        r"\boxed{1+x^2}",
    ],
    r"\text{Friday}": [
        r"\boxed{\text{Friday}}", "Friday",
    ],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [
        r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}",
    ],
    r"90^\circ": [
        r"\boxed{90}", "90 degrees", r"\boxed{90^{\circ}}", "90°",
    ],
    "11:30": [
        "11:30",
    ],
    "1,2,3": [
        "1, 2, 3", r"\boxed{1,2,3}", r"\boxed{3,2,1}",
    ],
    "3:4": [
        "3:4",
    ],
    r"(-\infty, 2)": [
        r"\boxed{(-\infty,2)}",
    ],
    "10": [
        "7 + 3 = 10. The answer is 10.",
    ],
    "1/2": [
        r"The probability is $\frac{1}{2}$, not $\frac{1}{3}$.", "The probability is not 1/3 but 1/2",
    ],
    "0": [
        "0", "The answer is 0.", r"\boxed{0}",
    ],
    "12": [
        "The answer is 12.0",
    ],
    "3.5": [
        "The answer is $3.50.", "$3.50", "3.5 hours", "3 1/2 hours",
    ],
    "68": [
        "467 - 399 = 68. The answer is 68.",
    ],
    "-12": [
        "The answer is -12 degrees.",
    ],
    "25%": [
        "The answer is 25 %.", "1/4",
    ],
    "100000": [
        "100,000 people", "100 000 people",
    ],
    r"\text{(C)}": [
        r"\boxed{C}", r"\boxed{\text{(C)}}",
    ],
    "yes": [
        "The answer is yes.", "Yes.",
    ],
    r"2\sqrt{3}": [
        "2√3", "The answer is 2√3.", r"2\sqrt{3}",
    ],
    r"15\frac{39}{40}": [
        r"$\boxed{15\frac{39}{40}},$ or $\boxed{\frac{639}{40}}$ inches",
    ],
    r"\boxed{15\frac{39}{40}},$ or $\boxed{\frac{639}{40}}": [
        "639/40",
    ],
    "1.5": [
        "1.5e0",
    ],
    "6.02e23": [
        r"6.02 \times 10^{23}", r"\boxed{6.02\times10^{23}}",
    ],
}  # fmt: skip

WRONG = {
    "5": [
        "The answer is not 5 but 7.", "The answer is 7, not 5.",
        r"First $5$, then... no: \boxed{5}. Wait, that is wrong. Corrected: \boxed{7}", "The answer is -5",
        "The answer is 5. No wait, the answer is 7.", "I first thought the answer was 5, but it is 7.",
        "The answers are 5 and 7.", r"$\boxed{5}$ and $\boxed{7}$", "3, 4, 5", "The answer is 5, 6.",
    ],
    r"\boxed{5, 7}": [
        r"\boxed{7}",
    ],
    r"\boxed{7}": [
        r"\boxed{5, 7}", r"\boxed{5} or \boxed{7}",
    ],
    "6": [
        "2 + 3 = 5",
    ],
    "-5": [
        "The answer is 5",
    ],
    "0.5": [
        "0.49",
    ],
    "50": [
        "5%",
    ],
    "0.333": [
        "1/3",
    ],
    "1/3": [
        "0.333", r"The probability is $\frac{1}{2}$, not $\frac{1}{3}$.",
    ],
    "-1/3": [
        "1/3",
    ],
    "3.14": [
        "3.15",
    ],
    "7": [
        "77", "17", "0.7", "7.5", "I do not know.", "",
    ],
    "12": [
        'Answer: 7\nExplanation: 3 + 4 = 7, and 12 is too many.',
    ],
    r"\pi": [
        "3.14159",
    ],
    "(3,4)": [
        "(4, 3)",
    ],
    "[3,4]": [
        r"\boxed{(3,4)}",
    ],
    r"\text{Friday}": [
        r"\boxed{\text{Monday}}",
    ],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [
        r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}",
    ],
    "11:30": [
        "11:15",
    ],
    "1,2,3": [
        r"\boxed{1,2}",
    ],
    r"(-\infty, 2)": [
        r"\boxed{(-\infty,2]}",
    ],
    "10": [
        "7 + 3 = 11. The answer is 11.",
    ],
    "100000": [
        "100000.5",
    ],
    "1,000": [
        "1",
    ],
    "1": [
        "1,000",
    ],
    r"\text{(C)}": [
        r"\boxed{\text{(D)}}",
    ],
    "yes": [
        "No",
    ],
}  # fmt: skip
