{{/* The user that the operator is. */}}
{{- define "cloister.operatorUser" -}}
{{ printf "system:serviceaccount:%s:%s-operator" .Release.Namespace (include "cloister.fullname" .) | toJson }}
{{- end -}}

{{/*
Who writes tenants' namespaces: the operator; the API server; the controllers, as users of kube-system or, where they share
one, by its name; the scheduler, which binds pods; the kubelets, which end them; and whom the values name.
*/}}
{{- define "cloister.admissionVariables" -}}
- name: user
  expression: request.userInfo.username
- name: groups
  expression: "has(request.userInfo.groups) ? request.userInfo.groups : []"
- name: isOperator
  expression: variables.user == {{ include "cloister.operatorUser" . }}
- name: isCluster
  expression: >-
    variables.user in ["system:apiserver", "system:kube-controller-manager", "system:kube-scheduler"]
    || variables.user.startsWith("system:serviceaccount:kube-system:")
    || "system:nodes" in variables.groups
- name: isAllowed
  expression: >-
    variables.user in {{ toJson .Values.admission.allowedUsers }}
    {{- with .Values.admission.breakGlassGroup }}
    || {{ toJson . }} in variables.groups
    {{- end }}
{{- end -}}

{{- define "cloister.admissionRemedy" -}}
change its Tenant instead
{{- with .Values.admission.breakGlassGroup }}, or in an emergency act as a member of {{ . }}{{ end }}
{{- end -}}
