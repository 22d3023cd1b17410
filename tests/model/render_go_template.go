// Render Go templates with the values that Ollama gives to a chat. Usage: go run render_go_template.go CASES.json
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type chat struct {
	Template string
	Messages []*message
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	var chats []chat
	text, err := os.ReadFile(os.Args[1])
	check(err)
	check(json.Unmarshal(text, &chats))
	rendered := []string{}
	for _, c := range chats {
		system := []string{}
		for _, m := range c.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		// Ollama's own function, on a certain day.
		functions := template.FuncMap{"currentDate": func(...string) string { return "2031-07-04" }}
		parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(c.Template)
		check(err)
		var out strings.Builder
		check(parsed.Execute(&out, map[string]any{"System": strings.Join(system, "\n\n"), "Messages": c.Messages}))
		rendered = append(rendered, out.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(rendered))
}
